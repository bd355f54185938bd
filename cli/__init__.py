"""Launchers: parse, then import what the command needs."""
