"""The index: everything known about every feature of an SAE on a corpus; built in one job, read without torch."""
