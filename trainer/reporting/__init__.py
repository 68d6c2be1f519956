"""The pages of `dcdit report`: what is found out about a run, and how it is laid out as HTML."""
