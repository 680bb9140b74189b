"""Content interest in click-through-rate prediction, on TorchRec (MIM, arXiv 2502.00321)."""
