"""Text in, blocks of token ids out: prepared once, offline, without torch.

`python -m data_prep --help` shows the commands.
"""
