"""One file per operator: its meaning in torch (which is the CPU path), its registration with
torch.library, its gradient, and the function that users call."""
