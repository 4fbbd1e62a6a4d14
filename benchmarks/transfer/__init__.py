"""What is a replaced block of a pretrained model worth on another task?"""
