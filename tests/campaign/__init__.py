"""What strangers and accidents put in front of the library: random files, kills, threads and servers.

    python -m tests.campaign [--minutes M] [--seed N] [--only AREA …] [--json FILE]

Each trial is right if it ends as it should, or in one short line of a ValueError or an OSError that names the
file. The same seed makes the same trials.
"""
