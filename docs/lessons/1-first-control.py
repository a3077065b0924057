# %% [markdown]
# # Your first control

# %%
print(1)
