"""The contract, the ground floor: types, errors, descriptor lists, the Engine protocol, the two faces."""
