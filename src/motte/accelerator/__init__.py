"""What runs outside: a calculator for linear operators. It believes nothing and is believed in nothing."""
