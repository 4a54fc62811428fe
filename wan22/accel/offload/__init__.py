"""Offloading: where models' weights are kept, and how they reach the device."""
