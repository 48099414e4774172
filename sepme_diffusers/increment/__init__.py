"""What an erasure is as factors, and the settings that it is made with."""
