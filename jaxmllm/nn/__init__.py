"""Small parts shared by the stages."""
