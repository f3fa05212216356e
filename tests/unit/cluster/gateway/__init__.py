"""What a gateway decides: access, bounds, deliveries, gaps."""
