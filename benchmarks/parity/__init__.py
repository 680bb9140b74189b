"""TorchRec's trainable collections beside our frozen ones, with the same rows and the same batches."""
