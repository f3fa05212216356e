"""Version 1 of the gRPC API: messages, their type stubs, and the service's stub and servicer."""
