"""The tables and figures of the paper, and the experiments that are run like them."""
