"""What a run takes of machines and networks, in joules: counted where it can be, else estimated."""
