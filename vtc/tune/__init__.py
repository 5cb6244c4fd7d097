"""Loyalty: how far a compressed model answers as the model does without compression, and the search
for the cheapest recipe that is loyal enough (`vtc tune`). No labels are needed."""
