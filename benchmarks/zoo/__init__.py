"""What does transform do to every family of timm, torchvision and transformers, and what do its peers do?"""
