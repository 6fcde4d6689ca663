"""What the package ``lmcache`` of this distribution needs: its commands, and words for what is missing."""
