"""Providers that make machines: what a cloud must be able to do, and the one way they are made.

`CloudProvider` is the provider; a cloud gives it a `Cloud`, a thin shell around its SDK. All that
decides (which step is next, what an error means, when to give up) is in `launching`, without I/O.
"""
