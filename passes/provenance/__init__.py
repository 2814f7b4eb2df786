"""Where dimensions come from: one rule per op, and the arithmetic on factors behind them."""
