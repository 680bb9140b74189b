"""TorchX components, one a stage."""
