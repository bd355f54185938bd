"""Averaging and distribution: codecs, rules, the exchange, synchronisation."""
