"""From a model and images to heatmaps: `explain`, and the parts that an audit runs by itself."""
