"""Search and evaluation: indexes, ranking metrics, flips, backfill curves, verification. numpy only."""
