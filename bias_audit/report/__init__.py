"""A recorded run, a comparison or a region check as one self-contained HTML page."""
