"""The sequencer: a pure state machine, an event log on disk, a thin network shell."""
