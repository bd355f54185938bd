"""What crosses the wire, and nothing else: messages, signatures, the chain, configuration, errors.

Importing this package brings in neither torch nor hivemind; only `transport.p2p` does.
"""
