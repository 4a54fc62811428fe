"""Step caches: passes of the transformer that are estimated from those of earlier steps."""
