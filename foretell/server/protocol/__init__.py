"""What goes over the wire, as pydantic models; they make the OpenAPI document too."""
