"""Speed and memory, each against a stated baseline in the same run.

At Stable Diffusion 1.5's true shape (random weights: speed does not depend on them) and on the built-in model. Times
are ratios: the baseline and ours take turns, so that what else the machine does falls on both, and a ratio is the
median over the pairs.
"""
