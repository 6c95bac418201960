"""What the figures of a run say: conclusions, tables, text and plots."""
