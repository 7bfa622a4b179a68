"""What people and judges say about responses: records, labellers, and sets of feedback."""
