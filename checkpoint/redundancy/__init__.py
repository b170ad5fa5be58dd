"""What survives lost hosts: groups over failure domains, parity in peers' memory, and rebuilding from it."""
