"""The linear operators that may run outside: convolutions of every kind and linear layers, as both sides know them."""
