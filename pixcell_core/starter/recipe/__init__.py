"""How the shipped weights were made: corpus, three trainings, measurements, cards."""
