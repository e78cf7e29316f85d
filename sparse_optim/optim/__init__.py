"""The torch.optim face: MaskedAdamW, and IncrementalMaskedAdamW (ID3)."""
