"""The protection schemes: what of a linear operator is computed inside, what outside, and what of it is private."""
