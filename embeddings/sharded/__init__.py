"""The frozen, sharded embedding of TorchRec models; users import from `mim_torchrec.embeddings`."""
