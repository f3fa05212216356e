"""What ``pdserve chaos`` decides: plans, targets, verdicts."""
