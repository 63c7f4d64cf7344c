"""Generated from proto/bridge/v1/bridge.proto by tools/generate_proto.py."""
