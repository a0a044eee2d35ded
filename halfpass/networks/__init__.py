"""Networks by name, their auxiliary heads, and how a network is cut."""
