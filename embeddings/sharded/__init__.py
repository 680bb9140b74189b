"""The frozen, sharded embedding of TorchRec models."""
