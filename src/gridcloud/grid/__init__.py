"""Brokers among peers: identity, signed documents, transport, communities, offers, leases."""
