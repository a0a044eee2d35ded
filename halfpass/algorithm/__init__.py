"""The algorithm: the steps of client, server and edge, the uncut network beside them, what clients hand over."""
