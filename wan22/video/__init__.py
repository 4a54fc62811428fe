"""Finished videos: the frames, the files that they become, and the recipe that travels in those."""
