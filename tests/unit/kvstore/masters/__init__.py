"""What masters decide: seats, members, copies, drains."""
