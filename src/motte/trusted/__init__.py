"""What runs inside. This folder and what it imports is the trusted computing base."""
