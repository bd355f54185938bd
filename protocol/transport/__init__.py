"""The network behind one small interface: `base` is the contract, `memory` and `p2p` implement it."""
