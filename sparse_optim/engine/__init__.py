"""One step over an active set: tensors only, no torch.optim."""
