"""The ground floor: data and formulas that the passes and the runtime share.

Modules here import nothing else of pabc. They know neither graphs nor schedules nor running models:
the kinds of attention, the structure of a call's arguments, numbers, FLOPs, and how sizes print.
"""
