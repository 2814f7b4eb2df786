"""Growth: how much of an error that is made at a step is left at the end."""

from __future__ import annotations

import numpy as np

from pabc.calibration.recording import Recording

FLOOR = 0.1
"""The share that is left of an error made in pure noise, relative to one at the end."""
EARLY = 3.0
"""By how much more an error of the first step counts than one of the others."""
EXTENT = 0.1
"""The share of the steps within which that decreases to a third."""


def expect_growth(recording: Recording, floor: float = FLOOR) -> np.ndarray:
    """Returns what is expected to be left at the end of an error made at each step, [n].

    A model that denoises well forgets what differs from its data: from nearly the same noise it
    comes to nearly the same result. So differences shrink like the noise in the latents, down to a
    floor. How much noise x_i has is told by its inner products with x_0, which is all noise, and
    with the result. Measured on two models, differences follow this within a factor of 2, with
    floors of 0.03 and 0.25.
    """
    n, gram = recording.num_steps, recording.inputs()
    last = n if recording.has_result else n - 1
    ends = gram[np.ix_([0, last], [0, last])]
    noise = np.zeros(n + 1)
    noise[: last + 1] = (np.linalg.pinv(ends, rcond=1e-10) @ gram[[0, last], : last + 1])[0]
    levels = np.hypot(np.clip(noise, 0.0, 1.0), floor)
    return levels[n] / levels[1:]


def amplify_early(num_steps: int) -> np.ndarray:
    """Returns the growth of errors of which those at the first steps grow, [n].

    The first steps decide what is generated. There, errors of forecasts grow, by 3 on the digits
    model, and differ up to 100 times between generations: the recorded one does not tell the worst.
    """
    return 1.0 + EARLY * np.exp(-np.arange(num_steps) / (EXTENT * num_steps))
